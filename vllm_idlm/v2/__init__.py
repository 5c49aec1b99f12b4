"""ISD in vLLM's Model Runner V2: the state of requests stays on the device, and no step waits for it."""
