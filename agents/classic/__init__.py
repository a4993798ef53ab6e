"""The classic parts: a Q-network with one output an action, its replay, its loop. Begin with ``loop.train_model``.

``model`` holds network and replay, ``data`` turns text files into batches.
"""
