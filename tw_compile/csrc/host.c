// The driver calls of a site, so that Python makes one call for them and not four. Compiled when first needed
// (ops/host.py), like the kernels. All arguments are integers: handles and addresses as the driver has them. A call that
// fails raises RuntimeError with the driver's name for the error.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stdint.h>

typedef void *Handle;

// The driver's functions, found by name in its library: nothing here needs CUDA to be compiled or imported.
typedef struct {
  int (*event_create)(Handle *event, unsigned flags);
  int (*event_record)(Handle event, Handle stream);
  int (*stream_wait_event)(Handle stream, Handle event, unsigned flags);
  int (*launch_kernel)(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                       unsigned block_z, unsigned shared_bytes, Handle stream, void **arguments, void **extra);
  int (*get_error_name)(int status, const char **name);
} Driver;

static PyObject *load(PyObject *module, PyObject *path) {
  Driver *driver = PyModule_GetState(module);
  const char *name = PyUnicode_AsUTF8(path);
  if (!name) return NULL;
  void *library = dlopen(name, RTLD_NOW);
  if (!library) return PyErr_Format(PyExc_RuntimeError, "%s", dlerror());
  *(void **)&driver->event_create = dlsym(library, "cuEventCreate");
  *(void **)&driver->event_record = dlsym(library, "cuEventRecord");
  *(void **)&driver->stream_wait_event = dlsym(library, "cuStreamWaitEvent");
  *(void **)&driver->launch_kernel = dlsym(library, "cuLaunchKernel");
  *(void **)&driver->get_error_name = dlsym(library, "cuGetErrorName");
  if (!driver->event_create || !driver->event_record || !driver->stream_wait_event || !driver->launch_kernel ||
      !driver->get_error_name)
    return PyErr_Format(PyExc_RuntimeError, "%s is not a CUDA driver", name);
  Py_RETURN_NONE;
}

// Reads `expected` integers; false, with an error set, if the arguments are not that.
static int numbers(PyObject *const *given, Py_ssize_t count, Py_ssize_t expected, uintptr_t *out) {
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "%zd arguments, where %zd are needed", count, expected);
    return 0;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    out[i] = (uintptr_t)PyLong_AsUnsignedLongLong(given[i]);
    if (out[i] == (uintptr_t)-1 && PyErr_Occurred()) return 0;
  }
  return 1;
}

static PyObject *answer(const Driver *driver, int status) {
  const char *name = NULL;
  if (status == 0) Py_RETURN_NONE;
  driver->get_error_name(status, &name);
  return name ? PyErr_Format(PyExc_RuntimeError, "CUDA call failed: %s", name)
              : PyErr_Format(PyExc_RuntimeError, "CUDA call failed: %d", status);
}

static PyObject *event(PyObject *module, PyObject *unused) {
  const Driver *driver = PyModule_GetState(module);
  Handle made = NULL;
  const int status = driver->event_create(&made, 2 /* CU_EVENT_DISABLE_TIMING */);
  return status ? answer(driver, status) : PyLong_FromVoidPtr(made);
}

// n: what launch() and start() have in front: function, threads in x and in y, shared_bytes, ctas, arguments
static int launch_on(const Driver *driver, Handle stream, const uintptr_t *n) {
  return driver->launch_kernel((Handle)n[0], n[4], 1, 1, n[1], n[2], 1, n[3], stream, (void **)n[5], NULL);
}

static PyObject *launch(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  const Driver *driver = PyModule_GetState(module);
  uintptr_t n[7];
  int status;
  if (!numbers(given, count, 7, n)) return NULL;
  Py_BEGIN_ALLOW_THREADS;
  status = launch_on(driver, (Handle)n[6], n);
  Py_END_ALLOW_THREADS;
  return answer(driver, status);
}

static PyObject *start(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  const Driver *driver = PyModule_GetState(module);
  uintptr_t n[10];
  int status;
  if (!numbers(given, count, 10, n)) return NULL;
  const Handle current = (Handle)n[6], side = (Handle)n[7], fork = (Handle)n[8], done = (Handle)n[9];
  Py_BEGIN_ALLOW_THREADS;
  status = driver->event_record(fork, current);
  if (status == 0) status = driver->stream_wait_event(side, fork, 0);
  if (status == 0) status = launch_on(driver, side, n);
  if (status == 0) status = driver->event_record(done, side);
  Py_END_ALLOW_THREADS;
  return answer(driver, status);
}

static PyObject *wait(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  const Driver *driver = PyModule_GetState(module);
  uintptr_t n[2];
  int status;
  if (!numbers(given, count, 2, n)) return NULL;
  Py_BEGIN_ALLOW_THREADS;
  status = driver->stream_wait_event((Handle)n[0], (Handle)n[1], 0);
  Py_END_ALLOW_THREADS;
  return answer(driver, status);
}

static PyMethodDef methods[] = {
    {"load", load, METH_O, "load(path): take the driver from this library; before all else"},
    {"event", event, METH_NOARGS, "event(): a new one in the current context, without a time"},
    {"launch", (PyCFunction)(void (*)(void))launch, METH_FASTCALL,
     "launch(function, threads_x, threads_y, shared_bytes, ctas, arguments, stream): enqueue a kernel"},
    {"start", (PyCFunction)(void (*)(void))start, METH_FASTCALL,
     "start(function, threads_x, threads_y, shared_bytes, ctas, arguments, current, side, fork, done): enqueue a kernel on side, "
     "a stream, behind all that is on the stream current, by the event fork; and record the event done behind it"},
    {"wait", (PyCFunction)(void (*)(void))wait, METH_FASTCALL, "wait(stream, event): what is enqueued next waits for the event"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "host", .m_size = sizeof(Driver), .m_methods = methods};

PyMODINIT_FUNC PyInit_host(void) { return PyModuleDef_Init(&definition); }
