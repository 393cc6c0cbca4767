"""Twenty small real tasks for the general agent, each with an outcome that can be checked.

`python -m benchmarks.agent_tasks --model <id>` runs them with any model of a running server. Each
task also has a script of tool calls that solves it, with which the tests replay it.
"""
