//! The overlay backend.
use super::{Backend, Detach, Health, Journal, Support, Traces};
use crate::error::{Error, Kind, Result};
use crate::host::Host;
use crate::plan::{BackendKind, Plan};

/// The overlay backend.
#[derive(Debug)]
pub struct Overlay;

impl Backend for Overlay {
    fn kind(&self) -> BackendKind {
        BackendKind::Overlay
    }
    fn host_support(&self, _: &Host) -> Support {
        Support::no("this build has no overlay backend", "")
    }
    fn support(&self, _: &Host, _: &Plan) -> Support {
        Support::no("this build has no overlay backend", "")
    }
    fn provision(&self, _: &Host, plan: &Plan, _: &mut dyn Journal) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "provision", &plan.id, "this build has no overlay backend"))
    }
    fn destroy(&self, _: &Host, _: &Plan, _: &Traces, _: Detach) -> Result<bool> {
        Ok(false)
    }
    fn health(&self, _: &Plan, _: &Traces) -> Health {
        Health::Gone
    }
}
