"""Turn the files of a published model package into a model that graphprune and others can load.

Each module has one function, ``convert(source, target)``: it reads ``source``, a folder that holds
the chosen members of the package, and fills ``target``, an empty folder. None of them reaches the
network, and none executes a pickle.
"""
