"""Linear layers as integer codes: their grid, their packed form, and the checkpoint that other readers load.

``grid`` and ``linear`` are arithmetic, ``packing`` the words of a GPTQ checkpoint, ``layers`` says which layers of a
model are quantised, ``checkpoint`` reads and writes whole directories.
"""
