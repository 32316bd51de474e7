/* enosys NAMES PROGRAM ARGS: the program runs with these system calls (comma between them) answered ENOSYS, and so does what it starts. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static const struct { const char *name; unsigned nr; } calls[] = {
    {"openat2", 437}, {"open_tree", 428}, {"move_mount", 429}, {"mount_setattr", 442}, {"statx", __NR_statx},
};

int main(int argc, char **argv) {
    struct sock_filter code[16];
    unsigned short n = 0;
    if (argc < 3) return 125;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (char *word = strtok(argv[1], ","); word; word = strtok(NULL, ",")) {
        size_t i = 0;
        while (i < sizeof calls / sizeof *calls && strcmp(word, calls[i].name)) i++;
        if (i == sizeof calls / sizeof *calls) { fprintf(stderr, "enosys: %s?\n", word); return 125; }
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[i].nr, 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog filter = {n, code};
    if (geteuid() != 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) {
        perror("enosys: no_new_privs");
        return 125;
    }
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0)) { perror("enosys: seccomp"); return 125; }
    execvp(argv[2], argv + 2);
    perror("enosys: exec");
    return 125;
}
