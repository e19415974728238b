"""vLLM: a plug-in that vLLM finds by the entry point ``vllm.general_plugins``. Nothing has to be imported::

    vllm serve MODEL -tp 2 --compilation-config '{"mode": "DYNAMO_TRACE_ONCE", "backend": "tokenweave"}'

plugin.py    what is registered, and the checks of vLLM's configuration
rows.py      rules and decompositions of vLLM's custom ops
attention.py the metadata of one half of a step
"""
