"""Teachers on disk: what a teacher says about every learned token, in few bytes, keyed by the row it belongs to.

``encode`` turns the signals of a row into bytes and back, ``ids`` is the code of its token ids, ``store`` keeps rows
in shards (``files``), ``description`` is what a cache says about itself, ``identity`` compares that with what is used,
``measure`` says what was lost.
"""
