//! The copy backend.
use super::{Backend, Detach, Health, Journal, Support, Traces};
use crate::error::{Error, Kind, Result};
use crate::host::Host;
use crate::plan::{BackendKind, Plan};

/// The copy backend.
#[derive(Debug)]
pub struct Copy;

impl Backend for Copy {
    fn kind(&self) -> BackendKind {
        BackendKind::Copy
    }
    fn host_support(&self, _: &Host) -> Support {
        Support::no("this build has no copy backend", "")
    }
    fn support(&self, _: &Host, _: &Plan) -> Support {
        Support::no("this build has no copy backend", "")
    }
    fn provision(&self, _: &Host, plan: &Plan, _: &mut dyn Journal) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "provision", &plan.id, "this build has no copy backend"))
    }
    fn destroy(&self, _: &Host, _: &Plan, _: &Traces, _: Detach) -> Result<bool> {
        Ok(false)
    }
    fn health(&self, _: &Plan, _: &Traces) -> Health {
        Health::Gone
    }
}
