// Reading a tensor without blocking the event loop. The copy into host memory is put on the tensor's stream by the call, so it sees the
// values of that moment, whatever becomes of the tensor; a thread of the environment's own (libuv's workers stay free for files and DNS)
// waits for it and fills the typed array; the promise is settled on the JavaScript thread.
#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <semaphore>
#include <thread>

#include "boundary.h"

namespace hstu {
namespace {

struct Read {
  Readback copy = {};
  void* target = nullptr;  // memory of `array`, which the reference keeps
  napi_ref array = nullptr;
  napi_deferred deferred = nullptr;
  std::optional<Error> error;
};

}  // namespace

class Reader {
 public:
  explicit Reader(napi_env env) : env_(env) {
    napi_value name;
    napi_create_string_utf8(env, "hstu read-back", NAPI_AUTO_LENGTH, &name);
    napi_status status = napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this, settle, &settled_);
    HSTU_CHECK(status == napi_ok, kInvalidArgument, "data(): no threadsafe function");
    napi_unref_threadsafe_function(env, settled_);
    thread_ = std::thread([this] { run(); });
    napi_add_env_cleanup_hook(env, [](void* reader) { delete static_cast<Reader*>(reader); }, this);
  }

  // Environment teardown: waits for the copies under way, whose host memory others get afterwards, and settles nothing more.
  ~Reader() {
    stopping_ = true;
    waiting_.release();
    thread_.join();
    napi_release_threadsafe_function(settled_, napi_tsfn_abort);
  }

  void add(std::unique_ptr<Read> read) {
    if (pending_++ == 0) napi_ref_threadsafe_function(env_, settled_);  // the process lives until the promise is settled
    {
      std::lock_guard<std::mutex> lock(mutex_);
      reads_.push_back(std::move(read));
    }
    waiting_.release();
  }

 private:
  void run() {
    while (true) {
      waiting_.acquire();
      std::unique_ptr<Read> read;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (reads_.empty()) return;  // only the destructor releases without a read
        read = std::move(reads_.front());
        reads_.pop_front();
      }
      try {
        device::wait_read(read->copy);
        if (!stopping_) std::memcpy(read->target, read->copy.host, read->copy.bytes);
      } catch (const Error& error) {
        read->error = error;
      }
      device::end_read(read->copy);
      if (!stopping_ && napi_call_threadsafe_function(settled_, read.get(), napi_tsfn_nonblocking) == napi_ok) read.release();
    }
  }

  static void settle(napi_env env, napi_value, void* reader, void* data) {
    std::unique_ptr<Read> read(static_cast<Read*>(data));
    if (!env) return;  // torn down before it could be settled
    Reader& self = *static_cast<Reader*>(reader);
    napi_value array;
    napi_get_reference_value(env, read->array, &array);
    napi_delete_reference(env, read->array);
    if (read->error)
      napi_reject_deferred(env, read->deferred, error_object(env, read->error->code, read->error->what()));
    else
      napi_resolve_deferred(env, read->deferred, array);
    if (--self.pending_ == 0) napi_unref_threadsafe_function(env, self.settled_);
  }

  napi_env env_;
  napi_threadsafe_function settled_ = nullptr;
  std::thread thread_;
  std::mutex mutex_;
  std::deque<std::unique_ptr<Read>> reads_;
  std::counting_semaphore<> waiting_{0};
  std::atomic<bool> stopping_{false};
  int64_t pending_ = 0;  // on the JavaScript thread
};

namespace {

// read_later(tensor, array): a promise of the array, filled with the values that the tensor has now.
napi_value read_later(napi_env env, const napi_value* arguments) {
  HostView view = host_view(env, arguments[0], arguments[1]);
  Addon& addon = addon_of(env);
  if (!addon.reader) addon.reader = new Reader(env);
  auto read = std::make_unique<Read>();
  read->target = view.host;
  read->copy = device::begin_read(view.tensor.data, view.bytes, view.stream);
  napi_value promise;
  napi_create_reference(env, arguments[1], 1, &read->array);
  napi_create_promise(env, &read->deferred, &promise);
  addon.reader->add(std::move(read));
  return promise;
}

}  // namespace

void register_readback(Napi::Object exports) { add_function(exports, "read_later", read_later); }

}  // namespace hstu
