"""The headers and libraries of TensorFlow's wheels, as the repository @tensorflow.

A package for each: @tensorflow//2_21 has the headers as a library and, as files, `libraries`. `@tensorflow//:versions.bzl` has the
packages' names as TENSORFLOWS.
"""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "headers",
    hdrs = glob({globs}),
    # What tf.sysconfig.get_compile_flags() says of every one of these TensorFlows.
    defines = [
        "EIGEN_MAX_ALIGN_BYTES=64",
        "_GLIBCXX_USE_CXX11_ABI=1",
    ],
    includes = {includes},
)

# In no cc_library: Bazel would have the linker write down where they lie here.
filegroup(
    name = "libraries",
    srcs = [
        "lib/libtensorflow_framework.so.2",
        "lib/libtensorflow_cc.so.2",
    ],
)
"""

def _tensorflow_configure(context):
    wheels = context.os.environ.get("STF_TENSORFLOWS")
    if not wheels:
        fail("Build through `make lib` or `python custom_ops/build.py`: they tell Bazel where TensorFlow is (STF_TENSORFLOWS).")
    names = []
    for wheel in wheels.split(" "):
        name, folders = wheel.split("=")
        folders = folders.split(":")
        names.append(name)
        includes = ["include"]
        context.symlink(folders[0] + "/include", name + "/include")
        context.symlink(folders[0], name + "/lib")
        for i, folder in enumerate(folders[1:]):
            includes.append("include_%d" % i)
            context.symlink(folder, name + "/" + includes[-1])
        globs = [include + "/**" for include in includes]
        includes += ["include/external/farmhash_archive/src", "include/external/highwayhash"]
        context.file(name + "/BUILD", _BUILD.format(globs = globs, includes = includes))
    context.file("BUILD", "")
    context.file("versions.bzl", "TENSORFLOWS = %r\n" % names)

tensorflow_configure = repository_rule(
    implementation = _tensorflow_configure,
    doc = """Makes @tensorflow of the wheels that the environment names.

    STF_TENSORFLOWS is 2_21=FOLDER, several with spaces between, where FOLDER is that of a wheel's `tensorflow`. More folders behind
    it, with colons between, have headers that the wheel lacks.
    """,
    environ = ["STF_TENSORFLOWS"],
    local = True,
)
