#!/usr/bin/env python3
"""Import of one archive beside GNU tar and sha512sum of the same, interleaved: plain, gzip and zstd.

  tests/bench/import.py [--fsprov PROGRAM] [--archive ACI] [--rounds N] [--json]     (scripts/bench --import)

Each round starts with the archive in the page cache and nothing to be written, and ends with everything on the disk: fsprov syncs
what it imports (and reads and hashes each file's bytes once more than tar does), so tar is followed by `sync -f`. The column `unsynced`
is tar and sha512sum without that. The archive is the ACI that the tests make of a Debian minbase (scripts/setup), unless one is named.
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
    parser.add_argument('--forms', default='plain,gzip,zstd')
    options = parser.parse_args()
    cache = os.environ.get('FSPROV_TEST_CACHE', '/var/cache/fsprov-test')
    archive = options.archive or next(iter(sorted(glob.glob(f'{cache}/minbase-*.aci'))), None)
    if not archive:
        sys.exit('import bench: no archive: scripts/setup makes one, or name one with --archive')
    work = tempfile.mkdtemp(prefix='fsprov-import-', dir='/var/tmp')
    packers = {'plain': None, 'gzip': ['gzip', '-6', '-c'], 'zstd': ['zstd', '-3', '-q', '-c']}
    rows = []
    try:
        for form in options.forms.split(','):
            path = os.path.join(work, f'archive.{form}')
            with open(archive, 'rb') as source, open(path, 'wb') as to:
                if packers[form]:
                    subprocess.run(packers[form], stdin=source, stdout=to, check=True)
                else:
                    shutil.copyfileobj(source, to)
            samples = {'fsprov': [], 'tar': [], 'unsynced': []}
            for number in range(options.rounds + 1):
                for who in samples:
                    to = os.path.join(work, who)
                    os.mkdir(to)
                    open(path, 'rb').read()
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
            rows.append({'form': form, 'archive_bytes': os.path.getsize(archive), 'rounds': options.rounds,
                         **{f'{who}_{what}': middle[who][i] for who in middle for i, what in enumerate(('s', 'cpu_s', 'peak_kib'))},
                         'samples': samples})
            os.unlink(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        print(json.dumps(rows))
        return
    print('| archive | fsprov | tar x, sha512sum, sync | ratio | unsynced | ratio | fsprov processor | tar processor | fsprov peak memory |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- | --- |')
    for row in rows:
        f, t, u = row['fsprov_s'], row['tar_s'], row['unsynced_s']
        print(f"| {row['form']} | {f:.2f} s ({row['archive_bytes'] / f / 1e6:.0f} MB/s) | {t:.2f} s | {f / t:.2f} | {u:.2f} s | {f / u:.2f} "
              f"| {row['fsprov_cpu_s']:.2f} s | {row['tar_cpu_s']:.2f} s | {row['fsprov_peak_kib'] / 1024:.0f} MiB |")


if __name__ == '__main__':
    main()
