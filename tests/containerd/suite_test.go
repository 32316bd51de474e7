// containerd's own tests of snapshotters, against `fsprov snapshotter` through the proxy that containerd itself uses.
package suite

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

func newSnapshotter(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	socket := filepath.Join(root, "socket")
	args := []string{"--root", filepath.Join(root, "root"), "snapshotter", "--socket", socket}
	args = append(args, strings.Fields(os.Getenv("FSPROV_ARGS"))...)
	program := exec.Command(os.Getenv("FSPROV_BIN"), args...)
	program.Stderr = os.Stderr
	if err := program.Start(); err != nil {
		return nil, nil, err
	}
	for n := 0; n < 1000; n++ {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	dial := func(ctx context.Context, _ string) (net.Conn, error) { return net.Dial("unix", socket) }
	conn, err := grpc.Dial("fsprov", grpc.WithInsecure(), grpc.WithContextDialer(dial))
	if err != nil {
		return nil, nil, err
	}
	end := func() error {
		conn.Close()
		program.Process.Signal(syscall.SIGTERM)
		err := program.Wait()
		// FUSE servers outlive it, and end with their mounts. A case that failed may leave some.
		lowers, _ := filepath.Glob(filepath.Join(root, "root/snapshotter/f/m/*/rootfs"))
		for _, lower := range lowers {
			syscall.Unmount(lower, syscall.MNT_DETACH)
		}
		return err
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "fsprov"), end, nil
}

func TestFsprov(t *testing.T) {
	// The suite knows by this name that a directory of a lower layer cannot be renamed without redirect_dir.
	testsuite.SnapshotterSuite(t, "overlayfs", newSnapshotter)
}
