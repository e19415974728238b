"""The name that TORCH_LOGS="tokenweave" asks for.

PyTorch reads TORCH_LOGS when it is imported, long before torch.compile looks for the backend, and refuses a name that is neither one
of its logs nor a module. It finds this module and does not import it. tw_compile/logs.py gives the name its log later.
"""
