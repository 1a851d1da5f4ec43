"""Tokenizers: what a recipe may say of them, how they are loaded, united and numbered."""
