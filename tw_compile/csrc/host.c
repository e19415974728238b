// The driver calls of a site, so that Python makes one call instead of four. Compiled at run time (transports/symmetric/host.py), like
// the kernels. All arguments are integers: handles and addresses of the driver. A call that fails raises RuntimeError with the driver's
// name of the error.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stdint.h>

typedef void *Handle;

// The functions of the driver, which are looked up by name in its library. So neither compiling nor importing this file needs CUDA.
typedef struct {
  int (*event_create)(Handle *event, unsigned flags);
  int (*event_record)(Handle event, Handle stream);
  int (*stream_wait_event)(Handle stream, Handle event, unsigned flags);
  int (*launch_kernel)(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                       unsigned block_z, unsigned shared_bytes, Handle stream, void **arguments, void **extra);
  int (*get_error_name)(int status, const char **name);
  int (*device_get)(int *device, int ordinal);
  int (*context_retain)(Handle *context, int device);
  int (*context_push)(Handle context);
  int (*context_pop)(Handle *context);
  int (*capture_info)(Handle stream, int *status, uint64_t *id, Handle *graph, const Handle **dependencies, size_t *count);
} Driver;

static PyObject *load(PyObject *module, PyObject *path) {
  Driver *driver = PyModule_GetState(module);
  const char *name = PyUnicode_AsUTF8(path);
  if (!name) return NULL;
  void *library = dlopen(name, RTLD_NOW);
  if (!library) return PyErr_Format(PyExc_RuntimeError, "%s", dlerror());
  const struct {
    void *place;
    const char *name;
  } functions[] = {
      {&driver->event_create, "cuEventCreate"},
      {&driver->event_record, "cuEventRecord"},
      {&driver->stream_wait_event, "cuStreamWaitEvent"},
      {&driver->launch_kernel, "cuLaunchKernel"},
      {&driver->get_error_name, "cuGetErrorName"},
      {&driver->device_get, "cuDeviceGet"},
      {&driver->context_retain, "cuDevicePrimaryCtxRetain"},
      {&driver->context_push, "cuCtxPushCurrent_v2"},
      {&driver->context_pop, "cuCtxPopCurrent_v2"},
      {&driver->capture_info, "cuStreamGetCaptureInfo_v2"},
  };
  for (size_t i = 0; i < sizeof functions / sizeof *functions; ++i) {
    *(void **)functions[i].place = dlsym(library, functions[i].name);
    if (!*(void **)functions[i].place) return PyErr_Format(PyExc_RuntimeError, "%s is not a CUDA driver", name);
  }
  Py_RETURN_NONE;
}

// Reads `expected` integers into `out`. Returns 0, with a Python error set, if the arguments are something else.
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

// The primary context of a GPU, which torch uses. It need not be current in the calling thread.
static PyObject *context(PyObject *module, PyObject *ordinal) {
  const Driver *driver = PyModule_GetState(module);
  Handle found = NULL;
  int device = 0;
  const long number = PyLong_AsLong(ordinal);
  if (number == -1 && PyErr_Occurred()) return NULL;
  int status = driver->device_get(&device, (int)number);
  if (status == 0) status = driver->context_retain(&found, device);
  return status ? answer(driver, status) : PyLong_FromVoidPtr(found);
}

// Functions that take a context make it current during the call. The calling thread may have no context or that of another GPU, and
// each context has its own default stream.

static PyObject *event(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  const Driver *driver = PyModule_GetState(module);
  uintptr_t n[1];
  Handle made = NULL, popped;
  if (!numbers(given, count, 1, n)) return NULL;
  int status = driver->context_push((Handle)n[0]);
  if (status) return answer(driver, status);
  status = driver->event_create(&made, 2 /* CU_EVENT_DISABLE_TIMING */);
  driver->context_pop(&popped);
  return status ? answer(driver, status) : PyLong_FromVoidPtr(made);
}

// A launch, packed by pack_launch() in host.py. side, fork and done are for start() only.
typedef struct {
  Handle function;
  uint64_t threads_x, threads_y, shared_bytes, ctas;
  void *arguments;
  Handle side, fork, done;
} Launch;

// Reads a packed launch and a stream. Returns NULL, with a Python error set, if the arguments are something else.
static const Launch *launch_and_stream(PyObject *const *given, Py_ssize_t count, uintptr_t *stream) {
  if (!numbers(given + 1, count - 1, 1, stream)) return NULL;
  if (!PyBytes_Check(given[0]) || PyBytes_GET_SIZE(given[0]) != sizeof(Launch)) {
    PyErr_SetString(PyExc_TypeError, "the first argument is no packed launch");
    return NULL;
  }
  return (const Launch *)PyBytes_AS_STRING(given[0]);
}

static int launch_on(const Driver *driver, const Launch *l, Handle stream) {
  void *arguments[] = {l->arguments};
  return driver->launch_kernel(l->function, l->ctas, 1, 1, l->threads_x, l->threads_y, 1, l->shared_bytes, stream, arguments, NULL);
}

static PyObject *launch(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  const Driver *driver = PyModule_GetState(module);
  uintptr_t stream;
  int status;
  const Launch *l = launch_and_stream(given, count, &stream);
  if (!l) return NULL;
  Py_BEGIN_ALLOW_THREADS;
  status = launch_on(driver, l, (Handle)stream);
  Py_END_ALLOW_THREADS;
  return answer(driver, status);
}

static PyObject *start(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  const Driver *driver = PyModule_GetState(module);
  uintptr_t current;
  int status;
  const Launch *l = launch_and_stream(given, count, &current);
  if (!l) return NULL;
  Py_BEGIN_ALLOW_THREADS;
  status = driver->event_record(l->fork, (Handle)current);
  if (status == 0) status = driver->stream_wait_event(l->side, l->fork, 0);
  if (status == 0) status = launch_on(driver, l, l->side);
  if (status == 0) status = driver->event_record(l->done, l->side);
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

static PyObject *capture(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  const Driver *driver = PyModule_GetState(module);
  uintptr_t n[2];
  int capturing = 0;
  uint64_t id = 0;
  Handle popped;
  if (!numbers(given, count, 2, n)) return NULL;
  int status = driver->context_push((Handle)n[0]);
  if (status) return answer(driver, status);
  status = driver->capture_info((Handle)n[1], &capturing, &id, NULL, NULL, NULL);
  driver->context_pop(&popped);
  if (status) return answer(driver, status);
  return PyLong_FromUnsignedLongLong(capturing ? id : 0);
}

static PyObject *follow(PyObject *module, PyObject *const *given, Py_ssize_t count) {
  const Driver *driver = PyModule_GetState(module);
  uintptr_t n[4];
  Handle popped;
  if (!numbers(given, count, 4, n)) return NULL;
  int status = driver->context_push((Handle)n[0]);
  if (status) return answer(driver, status);
  status = driver->event_record((Handle)n[3], (Handle)n[1]);
  if (status == 0) status = driver->stream_wait_event((Handle)n[2], (Handle)n[3], 0);
  driver->context_pop(&popped);
  return answer(driver, status);
}

static PyMethodDef methods[] = {
    {"load", load, METH_O, "load(path): take the driver from this library; before all else"},
    {"context", context, METH_O, "context(index): torch's, of the GPU of this number"},
    {"event", (PyCFunction)(void (*)(void))event, METH_FASTCALL, "event(context): a new one, without a time"},
    {"launch", (PyCFunction)(void (*)(void))launch, METH_FASTCALL, "launch(packed, stream): enqueue a kernel"},
    {"start", (PyCFunction)(void (*)(void))start, METH_FASTCALL,
     "start(packed, current): enqueue a kernel on the launch's side stream, behind all that is on the stream current, by its event fork; "
     "and record its event done behind it"},
    {"wait", (PyCFunction)(void (*)(void))wait, METH_FASTCALL, "wait(stream, event): what is enqueued next waits for the event"},
    {"capture", (PyCFunction)(void (*)(void))capture, METH_FASTCALL,
     "capture(context, stream): the number of the CUDA graph that is being captured there, 0 if none is"},
    {"follow", (PyCFunction)(void (*)(void))follow, METH_FASTCALL,
     "follow(context, before, stream, event): what is enqueued next on stream waits for all that is on the stream before"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "host", .m_size = sizeof(Driver), .m_methods = methods};

PyMODINIT_FUNC PyInit_host(void) { return PyModuleDef_Init(&definition); }
