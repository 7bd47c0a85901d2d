//! Conversations over real sockets, with the monitor in this process.
//!
//! The monitor's loop runs on the test's thread; the client is a blocking one on
//! another.

mod client;
mod conversation;
mod jobs;
pub(super) mod machine;
mod objects;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use block::Graph;
use block::runtime::{EventLoop, unblock};

use ::jobs::Jobs;

use super::{Monitor, QmpSocket};
use client::Client;

/// Runs `test` as a client of a monitor that `prepare` may have furnished.
fn with_monitor(prepare: impl FnOnce(&Rc<Monitor>), test: impl FnOnce(&Path) + Send + 'static) {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("qmp.sock");
    let event_loop = EventLoop::new("main").unwrap();
    event_loop.block_on(async {
        let graph = Graph::new();
        let monitor = Monitor::new(&graph, &Jobs::new(graph.handle()));
        prepare(&monitor);
        let address = format!("unix:{}", path.display()).parse().unwrap();
        monitor.listen(QmpSocket::bind(&address).unwrap()).unwrap();
        let at = path.clone();
        unblock(move || test(&at)).await;
        monitor.close().await;
    });
}
