"""The command line, ``textgen``."""
