"""The Python files of an exported model: plain torch and transformers, copied into its folder.

Nothing here imports the rest of the package. `configuration_storm.py` is also used to read such a folder, whose own
copies are never run.
"""
