//! What the integration tests share: who runs a case (lanes), how (harness), on what (stage, images), and what is compared (walk).
//! None of it uses the library: these are tests of the program, and the oracles must share no code with it.

pub(crate) mod harness;
pub(crate) mod images;
pub(crate) mod inside;
pub(crate) mod lane;
pub(crate) mod needs;
pub(crate) mod oci;
pub(crate) mod run;
pub(crate) mod server;
pub(crate) mod stage;
pub(crate) mod system;
pub(crate) mod walk;

pub(crate) use harness::Case;
pub(crate) use lane::{Enter, Lane};
pub(crate) use needs::Need;
pub(crate) use stage::Stage;
