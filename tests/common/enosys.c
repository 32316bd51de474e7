/* enosys CALLS PROGRAM ARGS: the program runs with these system calls (comma between them) answered ENOSYS, or another error (CALL=EBADF),
   and so does what it starts. fsconfig_fd is fsconfig with FSCONFIG_SET_FD alone. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ANY (-1)
enum { SET_FD = 5 };

static const struct { const char *name; unsigned nr; int command; } calls[] = {
    {"openat2", 437, ANY}, {"open_tree", 428, ANY}, {"move_mount", 429, ANY}, {"fsopen", 430, ANY}, {"fsconfig_fd", 431, SET_FD},
    {"mount_setattr", 442, ANY}, {"statx", __NR_statx, ANY},
};
static const struct { const char *name; unsigned nr; } errors[] = {
    {"ENOSYS", ENOSYS}, {"EBADF", EBADF}, {"EOPNOTSUPP", EOPNOTSUPP},
};

static void put(struct sock_filter *code, unsigned short *n, unsigned short op, unsigned k, unsigned char no) {
    code[(*n)++] = (struct sock_filter){op, 0, no, k};
}

int main(int argc, char **argv) {
    struct sock_filter code[64];
    unsigned short n = 0;
    if (argc < 3) return 125;
    for (char *word = strtok(argv[1], ","); word && n < 56; word = strtok(NULL, ",")) {
        size_t i = 0, e = 0;
        char *error = strchr(word, '=');
        if (error) *error++ = 0;
        while (i < sizeof calls / sizeof *calls && strcmp(word, calls[i].name)) i++;
        while (error && e < sizeof errors / sizeof *errors && strcmp(error, errors[e].name)) e++;
        if (i == sizeof calls / sizeof *calls || e == sizeof errors / sizeof *errors) {
            fprintf(stderr, "enosys: %s?\n", word);
            return 125;
        }
        int any = calls[i].command == ANY;
        put(code, &n, BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr), 0);
        put(code, &n, BPF_JMP | BPF_JEQ | BPF_K, calls[i].nr, any ? 1 : 3);
        if (!any) {
            put(code, &n, BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1]), 0);
            put(code, &n, BPF_JMP | BPF_JEQ | BPF_K, calls[i].command, 1);
        }
        put(code, &n, BPF_RET | BPF_K, SECCOMP_RET_ERRNO | errors[e].nr, 0);
    }
    put(code, &n, BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0);
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
