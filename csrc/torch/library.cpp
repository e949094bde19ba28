// What the op library needs or offers apart from its ops.
#include <dlfcn.h>

#include "call.hpp"

// Defined in libtorch_cuda, absent from a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t device, void** stream);

namespace fastattn::binding {

Stream current_cuda_stream(std::int32_t device) {
  require(built_with_cuda(), "fastattn is built without CUDA; pass CPU tensors");
  auto* get_stream = &aoti_torch_get_current_cuda_stream;
  if (get_stream == nullptr) {  // a torch that loads libtorch_cuda apart from libtorch
    if (void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY)) {
      get_stream = reinterpret_cast<decltype(get_stream)>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
      dlclose(library);
    }
  }
  require(get_stream != nullptr, "this torch has no CUDA; pass CPU tensors");
  Stream stream;
  require(get_stream(device, &stream.handle) == AOTI_TORCH_SUCCESS, "torch gave no current stream of cuda:", device);
  return stream;
}

}  // namespace fastattn::binding

// What Python asks of the build, through ctypes.
extern "C" [[gnu::visibility("default")]] const char* fastattn_cpu_instruction_set() {
  return fastattn::cpu_instruction_set();
}
extern "C" [[gnu::visibility("default")]] bool fastattn_built_with_cuda() { return fastattn::built_with_cuda(); }
