//! `fsprov snapshotter`: containerd's images and containers on this store.

use std::path::PathBuf;

use clap::Args;

use super::{Global, output};
use crate::error::{Error, Kind, Result};
use crate::snapshotter::{Known, LowerForm, Places, Socket, metrics_of, serve};
use crate::store::Store;

/// Where the units of scripts/ have it.
const SOCKET: &str = "/run/fsprov/snapshotter.sock";

#[derive(Debug, Args)]
#[command(after_help = "\
containerd finds it as a proxy plugin: docs/kubernetes-and-docker.md has its config.toml. Only root, and the user that it runs as, may use the socket.
A state directory belongs to one containerd. Containers run on while the snapshotter is stopped.

Examples:
  fsprov snapshotter --socket /run/fsprov/snapshotter.sock
  fsprov snapshotter --metrics --socket /run/fsprov/snapshotter.sock")]
pub(super) struct Snapshotter {
    /// The socket to listen on [default: the one that systemd passes]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Where snapshots are kept [default: snapshotter in the state root]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// containerd's own socket, for what its Diff service is to unpack
    #[arg(long, value_name = "PATH", default_value = "/run/containerd/containerd.sock")]
    containerd: PathBuf,
    /// Let containerd download layers that the store has, too: Docker lists and pushes images by what it downloaded
    #[arg(long)]
    no_claims: bool,
    /// How what lies below snapshots is shown: auto, as the layers' directories, and by FUSE where those cannot be mounted; fuse, always by FUSE
    #[arg(long, value_name = "FORM", value_enum, default_value = "auto", hide_possible_values = true)]
    lower: Lower,
    /// Print what the snapshotter on this socket did and has, in Prometheus's text format
    #[arg(long)]
    metrics: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Lower {
    Auto,
    Fuse,
}

impl Snapshotter {
    pub(super) fn run(&self, global: &Global) -> Result<()> {
        if self.metrics {
            let socket = self.socket.clone().unwrap_or_else(|| PathBuf::from(SOCKET));
            return output::text(&metrics_of(&socket)?);
        }
        let passed = crate::sys::raw::passed_fds().map_err(|e| Error::io("take the socket that was passed", "", e))?;
        let listen: Box<dyn FnOnce() -> Result<Socket>> = match (passed.into_iter().next(), self.socket.clone()) {
            (Some((_, fd)), _) => Box::new(|| Socket::passed(fd)),
            (None, Some(path)) => Box::new(move || Socket::make(&path)),
            (None, None) => {
                return Err(Error::new(Kind::Usage, "start snapshotter", "", "it was given no socket to listen on")
                    .hint("give one with --socket PATH"));
            }
        };
        let state = match &self.state {
            Some(state) => {
                std::path::absolute(state).map_err(|e| Error::io("find state directory", state.display(), e))?
            }
            None => global.paths()?.snapshotter(),
        };
        let store = Store::open(&global.paths()?)?.with_policy(super::settings()?.policy());
        let known = if self.no_claims { Known::Downloaded } else { Known::Committed };
        let lower = match self.lower {
            Lower::Auto => LowerForm::Auto,
            Lower::Fuse => LowerForm::Fuse,
        };
        let ready = || {
            if let Err(e) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
                log::warn!("tell systemd: {e}");
            }
        };
        serve(&Places { state, containerd: self.containerd.clone() }, store, (known, lower), listen, ready)
    }
}
