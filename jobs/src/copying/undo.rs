//! A start that fails has done nothing.

use std::rc::Rc;
use std::sync::Arc;

use block::{Backend, BackendUser, Drained, Graph, GraphError, Node, Permissions};

use crate::{JobKey, Jobs};

/// Takes back what the start of a job with a filter has done, when dropped before
/// [`Undo::disarm`]. In one drained section, on main.
pub(crate) struct Undo<'a> {
    graph: &'a Rc<Graph>,
    jobs: &'a Jobs,
    drained: &'a Drained,
    filter: Option<Arc<Node>>,
    job: Option<JobKey>,
    backends: Vec<Arc<Backend>>,
}

impl<'a> Undo<'a> {
    /// For a start that has put `filter` in.
    pub(crate) fn new(
        graph: &'a Rc<Graph>,
        jobs: &'a Jobs,
        drained: &'a Drained,
        filter: &Arc<Node>,
    ) -> Self {
        Self {
            graph,
            jobs,
            drained,
            filter: Some(Arc::clone(filter)),
            job: None,
            backends: Vec::new(),
        }
    }

    /// The job has been created.
    pub(crate) fn created(&mut self, job: JobKey) {
        self.job = Some(job);
    }

    /// Attaches the job somewhere.
    pub(crate) fn attach(
        &mut self,
        node: &Arc<Node>,
        permissions: Permissions,
        user: Arc<dyn BackendUser>,
    ) -> Result<Arc<Backend>, GraphError> {
        let backend = self.graph.attach("", node, permissions, Some(user))?;
        self.backends.push(Arc::clone(&backend));
        Ok(backend)
    }

    /// Notes an attachment above all others: the first to go.
    pub(crate) fn attached_on_top(&mut self, backend: &Arc<Backend>) {
        self.backends.insert(0, Arc::clone(backend));
    }

    /// The start has succeeded.
    pub(crate) fn disarm(mut self) {
        self.filter = None;
        self.job = None;
        self.backends.clear();
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        for backend in self.backends.drain(..) {
            self.graph.detach(&backend);
        }
        if let Some(filter) = self.filter.take()
            && let Err(error) = self.graph.remove_filter(&filter, self.drained)
        {
            // It was put in within the same section, and has done nothing.
            tracing::error!(%error, "a job's filter could not be taken out again");
        }
        if let Some(key) = self.job.take() {
            let effects = self.jobs.lock().set_up_failed(key);
            self.jobs.run(effects);
        }
    }
}
