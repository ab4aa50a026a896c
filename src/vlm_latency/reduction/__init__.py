"""Token reduction: methods that drop or merge vision tokens, and what puts one on a model.

>>> from vlm_latency.reduction import METHODS
>>> list(METHODS)
['identity', 'pixels', 'random', 'uniform', 'attention', 'diversity', 'merging', 'llm-attention']
"""

from vlm_latency.reduction.methods import METHODS, Kept, Method, Seen, method_of, refusal

__all__ = ["METHODS", "Kept", "Method", "Seen", "method_of", "refusal"]
