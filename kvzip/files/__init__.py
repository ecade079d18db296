"""Files of kvzip: tensors and a JSON header in the safetensors format, written whole or not at all, checked when read.

Only `tensors` needs torch: the rest answers before it is loaded.
"""
