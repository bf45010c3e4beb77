"Triton's interpreter, faster: it looks through all of triton.language at every call of a function, half of its time."
import inspect


def look_once():
    "The names of what is built in are the same every time, so they are looked up once"
    from triton.runtime import interpreter
    known, is_builtin = {}, interpreter.tl.core.is_builtin

    def patch_builtin(pkg, builder, scope):
        if pkg not in known: known[pkg] = [n for n, m in inspect.getmembers(pkg) if is_builtin(m)]
        for n in known[pkg]:
            if is_builtin(m := getattr(pkg, n)): interpreter._patch_attr(pkg, n, m, builder, scope)
    interpreter._patch_builtin = patch_builtin
