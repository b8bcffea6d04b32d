package dashboard

import "github.com/credence-iam/credence/operator/dashboard/view"

// Put stores a snapshot as if it had been gathered.
func (d *Dashboard) Put(s view.Snapshot) { d.store(s) }
