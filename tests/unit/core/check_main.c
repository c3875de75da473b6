/* The test program: `core-tests --list` names the cases; `core-tests CASE` runs one and ends with 0 if it passed. */
#include "check.h"

int main(int argc, char **argv) { return check_main(argc, argv); }
