"""The loop: model, tools, until there is nothing left to do. Pure logic over ports."""
