/* A stand-in for libnvidia-ml: its devices are the lines of the file that FAKE_NVML names, `UUID MIB [PARENT|lost]`.
   A MIG instance names its GPU; a GPU with instances is in MIG mode. FAKE_NVML_USED names a file of lines
   `UUID MIB`: what each of the caller's child processes holds there. FAKE_NVML_ASKED names a file that gets a line each
   time that is asked. The lists are read anew with every call. */
#define _GNU_SOURCE
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST = 64 };
struct device { char uuid[96], parent[96]; unsigned long long mib; };
static struct device devices[MOST];
static int count;

static void load(void) {
  const char *path = getenv("FAKE_NVML");
  FILE *file = path ? fopen(path, "r") : NULL;
  char line[256];
  count = 0;
  while (file && count < MOST && fgets(line, sizeof line, file)) {
    struct device *d = &devices[count];
    d->parent[0] = 0;
    if (sscanf(line, "%95s %llu %95s", d->uuid, &d->mib, d->parent) >= 2) count++;
  }
  if (file) fclose(file);
}
static int is_lost(struct device *d) { return !strcmp(d->parent, "lost"); }
static int is_gpu(struct device *d) { return !d->parent[0] || is_lost(d); }

int nvmlInit_v2(void) { return getenv("FAKE_NVML") ? 0 : 9; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : code == 15 ? "GPU is lost" : "Error"; }
int nvmlDeviceGetCount_v2(unsigned *n) {
  load(); *n = 0;
  for (int i = 0; i < count; i++) *n += is_gpu(&devices[i]);
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
  for (int i = 0; i < count; i++)
    if (is_gpu(&devices[i]) && index-- == 0) { *out = &devices[i]; return is_lost(&devices[i]) ? 15 : 0; }
  return 6;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
  load();
  for (int i = 0; i < count; i++)
    if (!strcmp(devices[i].uuid, uuid)) { *out = &devices[i]; return is_lost(&devices[i]) ? 15 : 0; }
  return 6;
}
int nvmlDeviceGetUUID(void *device, char *out, unsigned size) {
  snprintf(out, size, "%s", ((struct device *)device)->uuid); return 0;
}
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
  memory[0] = ((struct device *)device)->mib << 20; memory[1] = memory[0]; memory[2] = 0; return 0;
}
int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
  *current = *pending = 0;
  for (int i = 0; i < count; i++) if (!strcmp(devices[i].parent, ((struct device *)device)->uuid)) *current = *pending = 1;
  return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *most) { (void)device; *most = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **out) {
  for (int i = 0; i < count; i++)
    if (!strcmp(devices[i].parent, ((struct device *)device)->uuid) && index-- == 0) { *out = &devices[i]; return 0; }
  return 6;
}
struct process { unsigned pid; unsigned long long used; unsigned gpu, compute; };
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *n, struct process *out) {
  const char *path = getenv("FAKE_NVML_USED"), *asked = getenv("FAKE_NVML_ASKED");
  FILE *file = asked ? fopen(asked, "a") : NULL;
  if (file) { fputs("asked\n", file); fclose(file); }
  file = path ? fopen(path, "r") : NULL;
  char line[256], uuid[96]; unsigned long long mib, used = 0;
  unsigned room = *n;
  while (file && fgets(line, sizeof line, file))
    if (sscanf(line, "%95s %llu", uuid, &mib) == 2 && !strcmp(uuid, ((struct device *)device)->uuid)) used = mib << 20;
  if (file) fclose(file);
  *n = 0;
  if (!used) return 0;
  char name[64], pids[4096] = "";
  snprintf(name, sizeof name, "/proc/self/task/%d/children", getpid());
  FILE *children = fopen(name, "r");
  if (children) { if (!fgets(pids, sizeof pids, children)) pids[0] = 0; fclose(children); }
  for (char *p = strtok(pids, " \n"); p && *n < room; p = strtok(NULL, " \n"))
    out[(*n)++] = (struct process){ .pid = (unsigned)atoi(p), .used = used };
  return 0;
}
