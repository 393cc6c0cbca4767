"""The built-in local model: packaged small weights, served by llama.cpp in a child process."""
