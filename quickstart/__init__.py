"""How the policy and the problems that ship with Sparring were made: `make policy`."""
