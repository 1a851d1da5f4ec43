"""The protocols of merging 8 and 30 vision models: methods compared on tasks, with real models or with drawn images."""
