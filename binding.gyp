# For those who type `node-gyp rebuild`: the same CMake build, put where node-gyp would put it. CMakeLists.txt is the list of sources.
{
  "targets": [{
    "target_name": "hstu",
    "type": "none",
    "actions": [{
      "action_name": "cmake",
      "inputs": ["CMakeLists.txt", "<!@(find csrc cuda -type f 2>/dev/null || true)"],
      "outputs": ["<(PRODUCT_DIR)/hstu.node"],
      "action": ["sh", "-c", "unset MAKEFLAGS; cmake -S . -B build/cmake && cmake --build build/cmake --parallel $(nproc)"]
    }]
  }]
}
