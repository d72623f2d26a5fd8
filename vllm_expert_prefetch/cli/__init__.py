"""The command `vllm-expert-prefetch`. One module per subcommand; heavy imports happen inside functions."""
