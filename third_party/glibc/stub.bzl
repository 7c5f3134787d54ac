"""Stand-ins that the linker takes for a library of an old glibc; where the result is loaded, the system's own is used."""

def glibc_stub(name, functions, functions_2_3_4 = []):
    """A shared library without code.

    Args:
      name: of the library that it stands for.
      functions: what it has of version GLIBC_2.2.5, the first of x86-64.
      functions_2_3_4: what it has of version GLIBC_2.3.4.
    """
    versions = "GLIBC_2.2.5 { %s };" % " ".join([function + ";" for function in functions])
    if functions_2_3_4:
        versions += " GLIBC_2.3.4 { %s };" % " ".join([function + ";" for function in functions_2_3_4])
    code = "".join([".globl {0}\\n.type {0},@function\\n{0}:\\n".format(function) for function in functions + functions_2_3_4])
    native.genrule(
        name = name + "_stub",
        outs = [name],
        cmd = " && ".join([
            "printf '%s' > $@.map" % versions,
            "printf '%s' > $@.s" % code,
            "gcc -shared -nostdlib -Wl,-soname,%s -Wl,--version-script=$@.map -o $@ $@.s" % name,
        ]),
    )
