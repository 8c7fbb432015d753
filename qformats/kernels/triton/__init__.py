"""Triton kernels over lowered planes. Nothing here is imported before a CUDA tensor asks for it, or where Triton is missing.

``spec`` says what a layout is to a kernel: which plane is what, how a weight's value is put together, in which precision every step is
exact. ``codes``, ``parameters`` and ``weights`` make weights out of planes, ``sums`` the products of a few rows of x, with ``rounding``;
``products`` has the kernels (one source each for the vector, the tile and the dequantizing shape), ``launch`` grids and block sizes,
``tuning`` the table of measured block sizes.
"""
