"""Model architectures that vLLM lacks, registered by name (`ledger.architectures`) and imported only when served."""
