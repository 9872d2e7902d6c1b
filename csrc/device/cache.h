#pragma once

// Files that save work in the next process: compiled kernels, and what a trial of them came to. In
// FUSEDOPT_CACHE_DIR, else in fusedopt/ of XDG_CACHE_HOME or ~/.cache. Whatever is wrong with the folder
// or a file, it is as if the file were not there; several processes may read and write at once.

#include <optional>
#include <string>

namespace fusedopt {

class Cache {
 public:
  Cache();

  const std::string& folder() const { return folder_; }
  // Why it is not used; empty if it is.
  const std::string& problem() const { return problem_; }

  // `key` is all that the content depends on. The name says what it is to who looks into the folder.
  std::optional<std::string> read(const std::string& name, const std::string& key) const;
  // Why it was not written; empty if it was.
  std::string write(const std::string& name, const std::string& key,
                    const std::string& content) const;

 private:
  std::string path_of(const std::string& name, const std::string& key) const;

  std::string folder_, problem_;
};

}  // namespace fusedopt
