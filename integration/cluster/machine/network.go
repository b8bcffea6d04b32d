//go:build linux

package machine

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// bridge is the network device of a machine that is a switch.
const bridge = "machines"

// nic is the network device of a connected machine.
const nic = "eth0"

// handle returns a handle of the machine's network, and a function that closes it.
func (m *Machine) handle() (*netlink.Handle, func(), error) {
	ns, err := netns.GetFromPid(m.PID())
	if err != nil {
		return nil, nil, fmt.Errorf("opening the network of machine %s: %w", m.name, err)
	}
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("opening the network of machine %s: %w", m.name, err), ns.Close())
	}
	return h, func() { h.Close(); _ = ns.Close() }, nil
}

// Network makes the machine the switch of a network, with addresses, one of each IP family.
func (m *Machine) Network(addresses ...netip.Prefix) error {
	h, done, err := m.handle()
	if err != nil {
		return err
	}
	defer done()
	link := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}}
	if err := h.LinkAdd(link); err != nil {
		return fmt.Errorf("making a bridge in machine %s: %w", m.name, err)
	}
	return m.up(h, link, addresses)
}

// Join connects the machine to the network of the switch hub, with an address and a default gateway of each IP family.
func (m *Machine) Join(hub *Machine, addresses []netip.Prefix, gateways []netip.Addr) error {
	h, done, err := hub.handle()
	if err != nil {
		return err
	}
	defer done()
	own, ownDone, err := m.handle()
	if err != nil {
		return err
	}
	defer ownDone()
	at, err := h.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("finding the bridge of machine %s: %w", hub.name, err)
	}
	cable := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: "to-" + m.name, MasterIndex: at.Attrs().Index},
		PeerName:      nic,
		PeerNamespace: netlink.NsPid(m.PID()),
	}
	if err := h.LinkAdd(cable); err != nil {
		return fmt.Errorf("connecting machine %s to %s: %w", m.name, hub.name, err)
	}
	if err := h.LinkSetUp(cable); err != nil {
		return fmt.Errorf("connecting machine %s to %s: %w", m.name, hub.name, err)
	}
	peer, err := own.LinkByName(nic)
	if err != nil {
		return fmt.Errorf("connecting machine %s to %s: %w", m.name, hub.name, err)
	}
	if err := m.up(own, peer, addresses); err != nil {
		return err
	}
	for _, gateway := range gateways {
		if err := m.route(own, nil, gateway); err != nil {
			return err
		}
	}
	return nil
}

// Route routes a network to the machine at address.
func (m *Machine) Route(network netip.Prefix, address netip.Addr) error {
	h, done, err := m.handle()
	if err != nil {
		return err
	}
	defer done()
	return m.route(h, ipNet(network), address)
}

// route routes a network, or everything if it is nil.
func (m *Machine) route(h *netlink.Handle, network *net.IPNet, address netip.Addr) error {
	if err := h.RouteReplace(&netlink.Route{Dst: network, Gw: address.AsSlice()}); err != nil {
		return fmt.Errorf("routing %v to %v in machine %s: %w", network, address, m.name, err)
	}
	return nil
}

func (m *Machine) up(h *netlink.Handle, link netlink.Link, addresses []netip.Prefix) error {
	for _, address := range addresses {
		// Without the flag, the kernel looks for duplicates of an IPv6 address for a second, and no program can use it.
		if err := h.AddrAdd(link, &netlink.Addr{IPNet: ipNet(address), Flags: unix.IFA_F_NODAD}); err != nil {
			return fmt.Errorf("giving machine %s the address %v: %w", m.name, address, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bringing up %s of machine %s: %w", link.Attrs().Name, m.name, err)
	}
	m.address = addresses[0].Addr()
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
