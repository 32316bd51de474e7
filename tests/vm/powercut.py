#!/usr/bin/env python3
"""The guest's side of scripts/vm --power-cut: looks whether the state root is clean after the last cut, then works until the next.

  powercut.py SEED EXPECT    EXPECT: a file with what earlier boots said they finished, one "NAME ID" a line

Lines: "found: ..." for what recover and verify said, "check: PASS|FAIL ...", then "begin: WHAT" and "done: WHAT" for each step of the work.
"""
import json, os, random, shutil, subprocess, sys

WORK = '/srv/cut'
NAMES = ['one', 'two', 'three']
PATIENCE = 300


def fsprov(*args, check=True):
    done = subprocess.run(['fsprov', *args], cwd='/', stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=PATIENCE)
    if check and done.returncode: raise AssertionError(f'fsprov {" ".join(args)}: exit {done.returncode}: {done.stdout}{done.stderr}')
    return done


def make_inputs():
    """Images that any boot makes the same: 100 small files each, and a long one."""
    for n, name in enumerate(NAMES):
        top = f'/dev/shm/in-{name}'
        chance = random.Random(name)
        for d in range(10):
            os.makedirs(f'{top}/rootfs/etc/d{d}')
            for f in range(10):
                with open(f'{top}/rootfs/etc/d{d}/f{f}', 'wb') as file: file.write(chance.randbytes(chance.choice([0, 17, 4096, 30000])))
        for d in ('vol', 'tmp', 'data'): os.makedirs(f'{top}/rootfs/{d}')
        with open(f'{top}/rootfs/vol/long', 'wb') as file: file.write(chance.randbytes(3 << 20))
        with open(f'{top}/manifest', 'w') as file:
            json.dump({'acKind': 'ImageManifest', 'acVersion': '0.8.11', 'name': f'example.com/{name}'}, file)
        subprocess.run(['tar', '--sort=name', '--mtime=@1000000000', '--owner=0', '--group=0', '--numeric-owner', '-C', top, '-cf',
                        f'/dev/shm/{name}.aci', 'manifest', 'rootfs'], check=True)


def tree(top):
    seen = {}
    for where, dirs, files in os.walk(top):
        for name in dirs: seen[os.path.relpath(f'{where}/{name}', top)] = None
        for name in files:
            with open(f'{where}/{name}', 'rb') as file: seen[os.path.relpath(f'{where}/{name}', top)] = file.read()
    return seen


def check(expect):
    """What must be so after a cut."""
    recover = fsprov('recover', '--json')
    outcomes = [f'{one["id"]} {one["outcome"]}' for one in json.loads(recover.stdout or '[]')]
    print('found: recover:', ', '.join(outcomes) or 'nothing', flush=True)
    verify = fsprov('image', 'verify', check=False)
    print('found: verify:', verify.stdout.strip().replace('\n', '; ')[-300:] or 'nothing', flush=True)
    assert verify.returncode == 0, f'image verify: {verify.stdout}{verify.stderr}'
    for one in json.loads(fsprov('list', '--json').stdout): assert one['state'] == 'ready', f'after recover: {one}'
    fsprov('unmount', '--all')
    have = json.loads(fsprov('image', 'list', '--json').stdout)
    ids = {one['id'] for one in have}
    for name, id in expect.items(): assert id in ids, f'{name} was imported, and is gone: {have}'
    # A copied volume is whole or not there.
    for name in NAMES:
        for part in ('etc', 'vol'):
            volume = f'{WORK}/sandbox/{name}-{part}'
            if os.path.exists(volume) and os.listdir(volume):
                have, want = tree(volume), tree(f'/dev/shm/in-{name}/rootfs/{part}')
                differs = sorted(path for path in have.keys() | want.keys() if have.get(path, 'absent') != want.get(path, 'absent'))
                assert not differs, f'{volume} is not what was copied: {len(differs)} of {len(want)}: {differs[:9]}'
    for name in NAMES:
        again = json.loads(fsprov('image', 'import', '--json', f'/dev/shm/{name}.aci').stdout)
        assert expect.get(name, again['id']) == again['id'], f'{name}: another id'
        print(f'kept: {name} {again["id"]}', flush=True)
    fsprov('image', 'verify')
    left = os.listdir('/var/lib/fsprov/staging') if os.path.exists('/var/lib/fsprov/staging') else []
    assert not left, f'left in staging: {left}'


def work(chance):
    """Until the power goes."""
    os.makedirs(f'{WORK}/sandbox', exist_ok=True)
    for left in os.listdir(WORK):
        if left.startswith('old-'): shutil.rmtree(f'{WORK}/{left}', ignore_errors=True)
    turn = 0
    while True:
        turn += 1
        name = chance.choice(NAMES)
        step = chance.choice(['import', 'import', 'copy volume', 'fuse', 'overlay', 'bind', 'copy'])
        print(f'begin: {step} {name}', flush=True)
        place = f'{WORK}/r{turn}'
        if step == 'import':
            print(f'gone: {name}', flush=True)
            fsprov('image', 'rm', f'example.com/{name}', check=False)
            id = json.loads(fsprov('image', 'import', '--json', f'/dev/shm/{name}.aci').stdout)['id']
            print(f'kept: {name} {id}', flush=True)
        elif step == 'copy volume':
            # Renamed first: half a removal would look like half a copy.
            for part in ('etc', 'vol'):
                if os.path.exists(f'{WORK}/sandbox/{name}-{part}'): os.rename(f'{WORK}/sandbox/{name}-{part}', f'{WORK}/old-{turn}-{part}')
                shutil.rmtree(f'{WORK}/old-{turn}-{part}', ignore_errors=True)
            fsprov('mount', '--backend', 'fuse', '--sandbox', f'{WORK}/sandbox', '-v', f'{name}-etc:/etc:rw,copy', '-v', f'{name}-vol:/vol:rw,copy',
                   f'example.com/{name}', place)
        else:
            fsprov('mount', '--backend', step, f'example.com/{name}', place)
        print(f'done: {step} {name}', flush=True)
        if step != 'import' and chance.random() < 0.6: fsprov('unmount', place)
        elif step == 'import' and json.loads(fsprov('list', '--json').stdout): fsprov('unmount', '--all')


def main(seed, expect):
    make_inputs()
    with open(expect) as file: wanted = dict(line.split() for line in file)
    try: check(wanted)
    except Exception as why:
        print(f'check: FAIL {why}', flush=True)
        return 1
    print('check: PASS', flush=True)
    print('working:', flush=True)
    work(random.Random(int(seed)))


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
