"""The operators under tokred: each one a torch reference, a Triton kernel and a public function that chooses.

Nothing here knows a method or a host. Imports torch alone; triton is imported at the first launch of a kernel.
"""
