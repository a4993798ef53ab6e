"""The command line ``textgen``: one module a command. Begin with ``app``; ``options`` holds the shared options."""
