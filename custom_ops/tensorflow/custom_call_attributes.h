// Attributes of a custom call as MLIR writes them, which is how XLA takes them.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_CUSTOM_CALL_ATTRIBUTES_H_
#define STF_CUSTOM_OPS_TENSORFLOW_CUSTOM_CALL_ATTRIBUTES_H_

#include <cstdint>
#include <iomanip>
#include <locale>
#include <sstream>
#include <string>
#include <vector>

#include "custom_ops/tensorflow/attention/attributes.h"

namespace stf {

class CustomCallAttributes {
 public:
  CustomCallAttributes& Add(const char* name, int64_t value) { return Write(name, std::to_string(value) + " : i64"); }
  CustomCallAttributes& Add(const char* name, float value) {
    std::ostringstream digits(std::ios_base::out);  // nine of them give every float back
    digits.imbue(std::locale::classic());           // with a point whatever the program's locale says
    digits << std::scientific << std::setprecision(9) << value << " : f32";
    return Write(name, digits.str());
  }
  CustomCallAttributes& Add(const char* name, const std::vector<int64_t>& values) { return WriteArray(name, "i64", values); }
  CustomCallAttributes& Add(const char* name, const std::vector<int32_t>& values) { return WriteArray(name, "i32", values); }
  // A pattern's components, programs and scale.
  CustomCallAttributes& Add(const Program& program) {
    std::vector<int64_t> records;
    for (const stf_component& c : program.components) records.insert(records.end(), {c.kind, c.a, c.b, c.c, c.d, c.exclude});
    return Add("components", records).Add("program_begin", program.begin).Add("scale", program.scale);
  }

  std::string text() const { return text_ + "}"; }

 private:
  CustomCallAttributes& Write(const char* name, const std::string& value) {
    text_ += (text_.size() > 1 ? ", " : "") + std::string(name) + " = " + value;
    return *this;
  }

  template <typename T>
  CustomCallAttributes& WriteArray(const char* name, const char* type, const std::vector<T>& values) {
    std::string array = std::string("array<") + type;
    const char* separator = ": ";
    for (const T value : values) {
      array += separator + std::to_string(value);
      separator = ", ";
    }
    return Write(name, array + ">");
  }

  std::string text_ = "{";
};

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_CUSTOM_CALL_ATTRIBUTES_H_
