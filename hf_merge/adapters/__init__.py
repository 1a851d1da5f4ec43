"""A merge as a PEFT adapter over its base: what becomes of each tensor, and the folder that PEFT loads."""
