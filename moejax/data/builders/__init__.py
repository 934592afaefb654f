"""Data sets made from files that ship with pip packages and with Python itself, so that nothing has to be downloaded.

`sources` gathers documents and images (standard library only, fast to import); `embedded` holds the TFDS builders that write
them down. The builders' module lies in a package folder because TFDS looks for its metadata next to it.
"""
