# cmake -DSOURCE=csrc -DHEADERS="a.h b.h" -DOUTPUT=kernel_headers.cpp -P embed.cmake
# Writes the texts of headers as strings for kernel_source.cpp.
separate_arguments(HEADERS)
set(text "#include \"device/kernel_source.h\"\n\nnamespace fusedopt {\n\n")
string(APPEND text "const std::vector<Header>& kernel_headers() {\n")
string(APPEND text "  static const std::vector<Header> headers{\n")
foreach(header IN LISTS HEADERS)
  file(READ ${SOURCE}/${header} content)
  string(APPEND text "      {\"${header}\", R\"fusedopt(${content})fusedopt\"},\n")
endforeach()
string(APPEND text "  };\n  return headers;\n}\n\n}  // namespace fusedopt\n")
file(WRITE ${OUTPUT} "${text}")
