"""Files of kvzip: tensors and a JSON header in the safetensors format, written whole or not at all, checked when read.

Only `tensors` imports torch, so that a header is read without waiting for it.
"""
