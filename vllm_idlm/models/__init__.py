"""Model architectures that vLLM lacks, registered by name (`ledger.models`) and imported only when served."""
