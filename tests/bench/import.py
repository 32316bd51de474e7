#!/usr/bin/env python3
"""Import of one archive beside GNU tar and sha512sum of the same, interleaved: plain, gzip and zstd.

  scripts/bench --import [--fsprov PROGRAM] [--archive ACI] [--rounds N] [--dir DIR:FORM,...]... [--json]

Each round starts with the archive in the page cache and nothing to be written, and ends with everything on the disk: fsprov syncs
what it imports (and reads and hashes each file's bytes once more than tar does), so tar is followed by `sync -f`. The column `unsynced`
is tar and sha512sum without that. By default into a tmpfs (what the programs cost) and below /var/tmp (what the disk adds). The archive is the ACI that the tests make of a Debian minbase (scripts/setup), unless one is named.
"""
import argparse, glob, json, os, resource, shutil, statistics, subprocess, sys, tempfile, time

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def timed(*commands):
    """Run shell commands after one another: seconds, processor seconds, and the largest resident size of one, in KiB."""
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0
    for command in commands:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        text = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            sys.exit(f'import bench: {" ".join(command)}: status {status}: {text.decode(errors="replace")}')
        peak = max(peak, usage.ru_maxrss)
    took = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fsprov', default=os.environ.get('FSPROV_BIN', os.path.join(HERE, 'target/release/fsprov')))
    parser.add_argument('--archive')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--json', action='store_true')
    parser.add_argument('--dir', action='append')
    options = parser.parse_args()
    cache = os.environ.get('FSPROV_TEST_CACHE', '/var/cache/fsprov-test')
    archive = options.archive or next(iter(sorted(glob.glob(f'{cache}/minbase-*.aci'))), None)
    if not archive:
        sys.exit('import bench: no archive: scripts/setup makes one, or name one with --archive')
    rows = []
    for where in options.dir or ['/dev/shm:plain,gzip,zstd', '/var/tmp:plain']:
        place, _, forms = where.partition(':')
        rows += measure(options, archive, place, (forms or 'plain,gzip,zstd').split(','))
    if options.json:
        print(json.dumps(rows))
        return
    print('| below | archive | fsprov | tar x, sha512sum, sync | ratio | unsynced | ratio | fsprov processor | tar processor | fsprov peak memory |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |')
    for row in rows:
        f, t, u = row['fsprov_s'], row['tar_s'], row['unsynced_s']
        print(f"| {row['dir']} | {row['form']} | {f:.2f} s ({row['archive_bytes'] / f / 1e6:.0f} MB/s) | {t:.2f} s | {f / t:.2f} | {u:.2f} s "
              f"| {f / u:.2f} | {row['fsprov_cpu_s']:.2f} s | {row['tar_cpu_s']:.2f} s | {row['fsprov_peak_kib'] / 1024:.0f} MiB |")


def measure(options, archive, place, forms):
    """Rows for the forms of one archive, made below one directory."""
    work = tempfile.mkdtemp(prefix='fsprov-import-', dir=place)
    packers = {'plain': None, 'gzip': ['gzip', '-6', '-c'], 'zstd': ['zstd', '-3', '-q', '-c']}
    rows = []
    try:
        for form in forms:
            path = os.path.join(work, f'archive.{form}')
            with open(archive, 'rb') as source, open(path, 'wb') as to:
                if packers[form]:
                    subprocess.run(packers[form], stdin=source, stdout=to, check=True)
                else:
                    shutil.copyfileobj(source, to)
            samples = {'fsprov': [], 'tar': [], 'unsynced': []}
            # A disk's own time is long and steady.
            rounds = options.rounds if place == '/dev/shm' else min(options.rounds, 2)
            for number in range(rounds + 1):
                for who in samples:
                    to = os.path.join(work, who)
                    os.mkdir(to)
                    # Not by reading it here: a child's peak begins with ours.
                    subprocess.run(['cat', path], stdout=subprocess.DEVNULL, check=True)
                    subprocess.run(['sync', '-f', work], check=True)
                    if who == 'fsprov':
                        sample = timed([options.fsprov, '--root', to, 'image', 'import', path])
                    else:
                        # What is hashed is the uncompressed archive, as an ACI's id is of it.
                        hashed = ['sha512sum', path] if form == 'plain' else ['sh', '-c', f'{form} -dc {path} | sha512sum']
                        unpack = ['tar', '--numeric-owner', '--xattrs', '-xpf', path, '-C', to]
                        sample = timed(unpack, hashed, *([['sync', '-f', to]] if who == 'tar' else []))
                    shutil.rmtree(to)
                    if number:  # The first round warms up.
                        samples[who].append(sample)
            middle = {who: [statistics.median(s[i] for s in all) for i in range(3)] for who, all in samples.items()}
            rows.append({'dir': place, 'form': form, 'archive_bytes': os.path.getsize(archive), 'rounds': rounds,
                         **{f'{who}_{what}': middle[who][i] for who in middle for i, what in enumerate(('s', 'cpu_s', 'peak_kib'))},
                         'samples': samples})
            os.unlink(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return rows


if __name__ == '__main__':
    main()
