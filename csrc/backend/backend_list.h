/* X(name): the compute backends, preferred last. Absent ones have stand-ins in backend_absent.c. */
#define FM_BACKEND_LIST(X) X(cpu) X(metal)
