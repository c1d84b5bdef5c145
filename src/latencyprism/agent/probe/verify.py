"""Which of the attributes that a reader will read are known to the live classes.

Looks at classes alone, through ``type``'s own descriptors: no instance, no property, no metaclass and no
module hook of the target's is asked, so nothing of it runs. What a class body or any of its methods names
counts as there; a name that is nowhere in a class or its bases is certain to be gone. Runs inside the target.
"""

# [cut
import sys

# cut]

_mro_of = type.__dict__["__mro__"].__get__
_dict_of = type.__dict__["__dict__"].__get__
NAMES_LIMIT = 20000


def class_at(module, name):
    """A class of a module that is imported already, else None."""
    found = sys.modules.get(module)
    try:
        found = object.__getattribute__(found, "__dict__").get(name)
    except AttributeError:
        return None
    return found if isinstance(found, type) else None


def names_in(owner):
    """Every name that a class and its bases define, declare, or mention in a method."""
    names = set()
    for place in _mro_of(owner):
        if place is object:
            continue
        held = _dict_of(place)
        names.update(held)
        for key in (
            "__annotations__",
            "__annotations_cache__",
            "__dataclass_fields__",
            "__struct_fields__",
            "__slots__",
        ):
            value = held.get(key)
            if type(value) in (dict, tuple, list):
                names.update(name for name in value if type(name) is str)
            elif type(value) is str:
                names.add(value)
        for value in held.values():
            value = getattr(value, "__func__", value) if type(value) in (staticmethod, classmethod) else value
            code = value.__code__ if type(value) is type(names_in) else None
            if code is not None:
                names.update(code.co_names)
                if code.co_name == "__annotate__":  # 3.14: annotations not yet evaluated
                    names.update(name for name in code.co_consts if type(name) is str)
        if len(names) > NAMES_LIMIT:
            break
    return names


def verify(fields):
    """``{"module:Class|Class": [names]}`` -> what no such class has, as ``Class.name`` or
    ``module.Class``."""
    missing = []
    for place, wanted in fields.items():
        module, _, owners = place.partition(":")
        for name in owners.split("|"):
            owner = class_at(module, name)
            if owner is None:
                missing.append(module + "." + name)
                continue
            known = names_in(owner)
            missing += [name + "." + one for one in wanted if one not in known]
    return missing
