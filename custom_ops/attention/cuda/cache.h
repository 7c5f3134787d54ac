// What was worked out for earlier calls, found again by what it was worked out from.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_CACHE_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_CACHE_H_

#include <stddef.h>

#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>

namespace stf {
namespace cuda {

// The bytes of numbers and structs, one after another.
class Key {
 public:
  template <typename T>
  Key& AddAll(const T* values, size_t count) {
    static_assert(std::has_unique_object_representations_v<T>, "no bytes between members");
    bytes_.append(reinterpret_cast<const char*>(values), count * sizeof(T));
    return *this;
  }
  template <typename... T>
  Key& Add(const T&... values) {
    (AddAll(&values, 1), ...);
    return *this;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

// For all threads. Holds kMost values at the most, and then begins anew, so that it stays small under shapes that never come again.
template <typename Value, size_t kMost>
class Cache {
 public:
  // The value of a key: found, or made by make(Value*), which returns 0 or an error, that is not kept.
  template <typename Make>
  int Get(const Key& key, std::shared_ptr<const Value>* value, Make make) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = values_.find(key.bytes());
      if (found != values_.end()) {
        *value = found->second;
        return 0;
      }
    }
    auto made = std::make_shared<Value>();
    if (const int error = make(made.get())) return error;
    std::lock_guard<std::mutex> lock(mutex_);
    if (values_.size() >= kMost) values_.clear();
    *value = values_.emplace(key.bytes(), std::move(made)).first->second;
    return 0;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<const Value>> values_;
};

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_CACHE_H_
